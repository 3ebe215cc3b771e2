"""All calls of the public API: the one list that dispatch, the OpenAPI document and the documents are made from."""

from __future__ import annotations

from kvstore.router.routes.batch import BATCH_ROUTES
from kvstore.router.routes.changes import CHANGE_ROUTES
from kvstore.router.routes.cluster import CLUSTER_ROUTES
from kvstore.router.routes.demo import COORDINATE_ROUTES, TRANSFER_ROUTES
from kvstore.router.routes.events import EVENT_ROUTES
from kvstore.router.routes.keys import KEY_ROUTES
from kvstore.router.routes.locks import LOCK_ROUTES
from kvstore.router.routes.page import PAGE_ROUTES
from kvstore.router.routes.process import PROCESS_ROUTES
from kvstore.router.routes.txn import TXN_ROUTES
from kvstore.transport.http.routes import Route

PUBLIC_ROUTES: tuple[Route, ...] = (
    *KEY_ROUTES,
    *BATCH_ROUTES,
    *LOCK_ROUTES,
    *TXN_ROUTES,
    *CLUSTER_ROUTES,
    *CHANGE_ROUTES,
    *PROCESS_ROUTES,
    *EVENT_ROUTES,
    *PAGE_ROUTES,
)
DEMO_ROUTES: tuple[Route, ...] = (*TRANSFER_ROUTES, *COORDINATE_ROUTES)
