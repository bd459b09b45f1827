"""The managed loop: prompts -> responses -> scores -> `learn`, with evaluation and a run folder."""
