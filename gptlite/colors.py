"""The colours of the book's figures."""

# The hues of Okabe and Ito (2008), which colour-blind readers tell apart, without yellow. Their lightness is chosen so
# that each stands out 3:1 from a white page and from a dark one (#121212), and each from every other. Black is not
# among them, because `figure` turns it into the page's own text colour: use "black" for what is to look like text.
COLORS = {
    "blue": "#006BA8",
    "orange": "#BD8300",
    "green": "#007555",
    "red": "#A24700",
    "purple": "#C66A9D",
    "sky": "#209CE2",
}
