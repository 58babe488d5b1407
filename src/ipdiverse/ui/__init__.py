"""The web page. Only this package imports gradio.

server.py opens and closes it as options.py says, safety.py says who may ask for what; app.py puts
the tabs together: vary.py, grid.py and reports.py, made of references.py and inputs.py (what a
visitor gives) and results.py (what comes back). studio.py holds what visitors share, jobs.py draws;
closeness.py and hints.py say what came out, recipes.py how to repeat it, status.py how far it is.
"""
