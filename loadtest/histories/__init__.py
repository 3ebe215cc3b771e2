"""What clients did to a store and what it answered, and the checkers that judge it."""
