"""Where bytes come from: one origin -> verified local files (`fetch`), files -> rows (`read`), and who may use them (`policy`)."""
