"""A simulated world below the program: what tests and simulations put in place of the machine."""
