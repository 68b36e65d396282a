"""What a person reads at the end: the page, the plots, the table in the terminal."""
