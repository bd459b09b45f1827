"""Fast paths: each module computes what a plain twin computes, with less work or memory."""
