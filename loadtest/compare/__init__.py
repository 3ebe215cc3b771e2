"""Side-by-side benchmark of this cluster, etcd, Redis behind webdis, and a bare HTTP handler that stores nothing."""
