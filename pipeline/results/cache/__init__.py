"""What a teacher cache holds, how true it is, and whether it is whole."""
