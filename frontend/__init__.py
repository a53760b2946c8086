"""The web page: a thin Gradio client of the REST API. Imports none of ours."""
