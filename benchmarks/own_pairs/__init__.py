"""Does the README's recipe for a user's own table work?

The table holds drawn pictures, and the benchmark knows which captions are swapped.
"""
