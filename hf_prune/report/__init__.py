"""Tables for the terminal and plots for the card."""
