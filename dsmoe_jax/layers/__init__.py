"""The layers of the model; they name logical axes and never the mesh."""
