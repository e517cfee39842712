"""What every engine and front end shares: the problem, its layout, its statistics, and the machine."""
