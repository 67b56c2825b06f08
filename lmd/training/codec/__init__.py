"""How the default codec is trained and measured."""
