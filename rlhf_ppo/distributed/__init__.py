"""Multi-process training: collectives, DeepSpeed and FSDP2 sharding, CPU offload of frozen models, shutdown."""
