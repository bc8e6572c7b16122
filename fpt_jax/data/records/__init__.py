"""What is stored for an image of a data set, and how it is encoded."""
