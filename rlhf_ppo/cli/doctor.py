"""`rlhf-ppo doctor MODEL`: sample from a model, score its tokens as training does, and name what does not agree."""

import argparse
import sys


def main(arguments: list[str]) -> int:
    """Print the findings and the fast paths; exit status 1 for a model that cannot be trained so, or with a warning."""
    parser = argparse.ArgumentParser(prog="rlhf-ppo doctor", description=__doc__)
    parser.add_argument("model", help="folder or hub name of a causal language model")
    parser.add_argument("--prompts", help="file, folder or hub dataset with a column `prompt` (four short texts)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="INT", help="length of the responses (16)")
    options = parser.parse_args(arguments)
    from rlhf_ppo.cli.examination import examine  # torch comes with it

    try:
        lines, is_healthy = examine(options.model, options.prompts, options.max_new_tokens)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if is_healthy else 1
