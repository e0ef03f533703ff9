"""From documents to packed rows on the mesh."""
