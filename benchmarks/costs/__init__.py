"""What a step costs: the methods that are timed, and how."""
