"""What is asked of the bundled models for their golden; apart from the script, which needs torch."""

COLUMNS = 8
TEXT = 'def read_json(path):\n    """Return the object."""\n    with open(path) as f:\n'
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sort these words: pear, fig"}]
