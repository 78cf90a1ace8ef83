"""Records: what is kept, the rules it keeps, and their verification."""
