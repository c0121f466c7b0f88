"""`specpair bench`: how fast running services are, by what they are asked, and beside what theory says."""
