"""Run the sentiment recipe in float32, also on processors where it would compute in bfloat16."""

import ppo_gpt2_sentiment as recipe

from sentiment import stages

if __name__ == "__main__":
    stages.precision = lambda algorithm="ppo-clip": {}
    stages.run(recipe.main, recipe.Config, recipe.__doc__)
