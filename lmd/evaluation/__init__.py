"""What music is measured with, and the tables made from it."""
