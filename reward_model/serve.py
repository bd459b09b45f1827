"""The command `python -m reward_model.serve`, which serves a reward model over HTTP."""

import logging
from collections.abc import Sequence

from reward_model.serving.config import ServeConfig
from reward_model.utils.commands import model_as_option, parse, run

logger = logging.getLogger(__name__)

EXAMPLES = """  rlhf-ppo reward serve runs/my_reward
  REWARD_MODEL_TOKEN=secret rlhf-ppo reward serve runs/my_reward --host 0.0.0.0 --port 8018"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model and serve until interrupted."""
    (config,) = parse(
        (ServeConfig,),
        model_as_option(arguments),
        program="python -m reward_model.serve",
        description="Serve a reward model over HTTP (POST /score, or /get_reward as OpenRLHF asks).",
        examples=EXAMPLES,
    )
    from reward_model.models.ensemble import load_model  # torch comes with these
    from reward_model.serving.server import application

    app = application(load_model(config, caution=config.caution), config)
    import uvicorn

    logger.info("Serving %s on http://%s:%d/score", config.model, config.host, config.port)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    run(main, alone=True)
