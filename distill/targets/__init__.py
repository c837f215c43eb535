"""What the teacher says about a position, made small: schemes, their stored form, and the walk over hidden states."""
