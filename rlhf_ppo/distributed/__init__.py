"""Several processes: collectives, sharded parameters, where frozen models wait, an orderly exit."""
