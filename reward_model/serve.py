"""The command `python -m reward_model.serve`, which serves a reward model over HTTP."""

import logging
from collections.abc import Sequence

from reward_model.serving.server import ServeConfig, application
from reward_model.utils.commands import model_as_option, parse, run

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model and serve until interrupted."""
    (config,) = parse(
        (ServeConfig,),
        model_as_option(arguments),
        program="python -m reward_model.serve",
        description="Serve a reward model over HTTP (POST /score, or /get_reward as OpenRLHF asks).",
    )
    app = application(config.load_model(caution=config.caution), config)
    import uvicorn

    logger.info("Serving %s on http://%s:%d/score", config.model, config.host, config.port)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    run(main)
