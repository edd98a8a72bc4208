"""What a task asks and how its answers are scored; one file a task, and none needs torch to be imported."""
