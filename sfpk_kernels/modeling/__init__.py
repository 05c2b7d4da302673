"""What is done with a user's model and batches, and put back."""
