"""How to get a data set from Kaggle."""


def download_command(dataset: str, folder: str = "data") -> str:
    """Return the shell command that downloads a Kaggle data set into `folder`."""
    call = f"kagglehub.dataset_download('{dataset}', output_dir='{folder}')"
    return f'pip install kagglehub && python -c "import kagglehub; {call}"'
