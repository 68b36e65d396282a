"""Generation engines, which answer the prompts of the stage evaluate: the config group `engine`."""
