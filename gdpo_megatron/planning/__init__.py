"""What a run will need, before it is started: the plan, and the dry run of its whole world."""
