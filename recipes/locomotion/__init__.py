"""What the locomotion recipe shows of a run."""
