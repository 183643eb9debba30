"""Drawn pictures as a user's own table, with swapped captions whose truth is known: does the README's recipe work?"""
