"""What a training needs of a machine that is not there, from programs compiled for it."""
