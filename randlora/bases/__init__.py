"""The frozen random bases: their spec, the random streams they are drawn from, and their storage."""
