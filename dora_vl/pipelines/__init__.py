"""What a run of each kind is made of, from the base to the test after training; what the task scripts start."""
