"""What spectra and distances are called: for recipes and help, which need no arithmetic."""

ORDERS = ("textbook", "transposed")
DISTANCES = ("raw", "cosine", "pca", "autoencoder")
# Those that have to be fitted to other spectra.
FITTED = ("pca", "autoencoder")
