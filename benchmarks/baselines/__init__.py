"""The plain ways to distill, with what others have, and the comparison of ours with them."""
