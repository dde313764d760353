"""The rows of a query as a verified file of canonical JSONL: streamed from the database, ordered by a unique column."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from conf.errors import DataError, DigestMismatch, SourceError
from conf.schema import SqlSource
from stages.files import canonical, remove
from stages.sources.download import DOWNLOADS
from stages.sources.files import too_large
from stages.sources.plain import plain


def rows(name: str, origin: SqlSource, retries: int) -> Iterator[dict[str, object]]:
    """Yield the rows in order, holding only a thousand of them.

    Raises:
        SourceError: the variable, the driver or the database is missing, or refuses the query.
        DataError: two rows have the same value in the ordering column.
    """
    import sqlalchemy as sa
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    url = os.environ.get(origin.url_env)
    if not url:
        raise SourceError(f"{name}: the environment variable {origin.url_env} is not set", "set it to the SQLAlchemy URL of the database")
    statement = sa.select(sa.text("*")).select_from(sa.text(f"({origin.query.strip().rstrip(';')}\n) AS rows_")).order_by(sa.column(origin.order_by))
    refusals: tuple[type[Exception], ...] = (sa.exc.SQLAlchemyError,)
    try:
        engine = sa.create_engine(url, hide_parameters=True)
        refusals += (engine.dialect.loaded_dbapi.Warning,)  # PEP 249: no Error, and so not wrapped; SQLite's for a second statement
        connect = Retrying(
            stop=stop_after_attempt(retries + 1),
            wait=wait_exponential(multiplier=0.5, max=30.0),
            retry=retry_if_exception_type(sa.exc.OperationalError),
            reraise=True,
        )
        with connect(engine.connect) as connection, connection.execution_options(stream_results=True, yield_per=1000).execute(statement) as result:
            last: object = None
            for number, row in enumerate(result.mappings(), 1):
                key = row.get(origin.order_by)
                if key is None or key == last:
                    raise DataError(f"{name}: row {number} has {origin.order_by}={key!r}, which is not unique", "order by a unique column")
                last = key
                yield {str(column): plain(value, f"{name}: row {number}, column {column}") for column, value in row.items()}
        engine.dispose()
    except ModuleNotFoundError as error:
        raise SourceError(f"{name}: the driver {error.name} of {origin.url_env} is not installed", f"pip install {error.name}") from error
    except refusals as error:
        said = str(getattr(error, "orig", None) or error).split("\n")[0].replace(url, f"${origin.url_env}")
        raise SourceError(f"{name}: the database of {origin.url_env} refuses: {said}", "check the URL, the network and the query") from error


def extract(name: str, origin: SqlSource, *, retries: int, max_bytes: int) -> Path:
    """Write the rows into the downloads cache under their digest.

    Raises:
        DigestMismatch: they are not the pinned rows.
    """
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    partial = DOWNLOADS / f"{origin.sha256}.sql.partial"
    hashed, size = hashlib.sha256(), 0
    try:
        with partial.open("wb") as file:
            for row in rows(name, origin, retries):
                line = canonical(row, indent=None).encode()
                hashed.update(line)
                size += len(line)
                if size > max_bytes:
                    raise too_large(f"{name}: the query's result", max_bytes)
                file.write(line)
        if hashed.hexdigest() != origin.sha256:
            remedy = "if these rows are right, pin their digest; otherwise the table has changed"
            raise DigestMismatch(f"{name} (rows of the query)", origin.sha256, hashed.hexdigest(), remedy)
        partial.replace(DOWNLOADS / origin.sha256)
    finally:
        remove(partial)
    return DOWNLOADS / origin.sha256
