"""What is to be done on a machine with a GPU, one command for each step; see README.md here."""
