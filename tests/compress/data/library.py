"""A standard library of a few docstrings."""


def write_library(folder, packages):
    """A library of {package: {function: docstring}}; a package is a folder with one module."""
    for package, functions in packages.items():
        (folder / package).mkdir(parents=True, exist_ok=True)
        body = "\n\n".join(f'def {name}():\n    """{text}"""' for name, text in functions.items())
        (folder / package / "__init__.py").write_text(body)
    return folder
