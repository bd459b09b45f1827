"""Run the sentiment recipe in float32, also on processors where it would compute in bfloat16."""

import ppo_gpt2_sentiment as recipe

from sentiment import command_line, settings

if __name__ == "__main__":
    settings.AlgorithmSettings.precision = {}  # type: ignore[assignment]
    command_line.run(recipe.main, recipe.Config, recipe.__doc__)
