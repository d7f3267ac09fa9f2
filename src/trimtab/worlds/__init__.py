"""Where prompts, facts and exact verdicts come from."""
