"""`trace info | import | compose | synth`: look at routing, read other formats, batch it, make it up."""

import typer

app = typer.Typer()
