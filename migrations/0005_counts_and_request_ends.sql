-- How many entries a workspace has, so that the first page of a list need not count them: the sum over its parts. Written in the
-- transaction of each batch that adds or deletes entries, so it is exact whatever crashes. Several parts, because imports and deletions that
-- run side by side would otherwise wait for each other's commit. Servers from before this migration do not write it: stop them first.
CREATE TABLE entry_counts (
    workspace_id bigint NOT NULL,
    part smallint NOT NULL,
    entries bigint NOT NULL,
    PRIMARY KEY (workspace_id, part)
);
-- Nothing may come in between the counting and the first batch that is counted.
LOCK TABLE entries IN SHARE MODE;
INSERT INTO entry_counts (workspace_id, part, entries)
SELECT workspace_id, 0, count(*) FROM entries GROUP BY workspace_id;

-- When the import of a request id succeeded; set in the transaction that ends it, and only by the import that still has the claim. One that lost
-- it, because its server could not renew the lease, does not succeed.
ALTER TABLE import_requests ADD COLUMN finished_at timestamptz;
UPDATE import_requests SET finished_at = imports.finished_at
FROM imports WHERE imports.workspace_id = import_requests.workspace_id AND imports.id = import_requests.import_id;

-- What the second and later batches of an import add to its row in imports: a row a batch, so that batches that run side by side do not wait for
-- each other's commit at one row. They are added to the import's row, and go, when it ends or breaks; those of a server that crashed stay here.
CREATE TABLE import_batches (
    workspace_id bigint NOT NULL,
    import_id uuid NOT NULL,
    batch bigint NOT NULL,
    imported bigint NOT NULL,
    skipped bigint NOT NULL,
    failed bigint NOT NULL,
    PRIMARY KEY (workspace_id, import_id, batch)
);

-- The import log with everything that is stored, whatever crashed. A batch of which nothing is new is counted when its import ends.
CREATE VIEW import_log AS
SELECT workspace_id, id, key_id, started_at, finished_at,
    imports.imported + COALESCE(later.imported, 0) AS imported,
    imports.skipped + COALESCE(later.skipped, 0) AS skipped,
    imports.failed + COALESCE(later.failed, 0) AS failed
FROM imports
LEFT JOIN LATERAL (
    SELECT sum(imported)::bigint AS imported, sum(skipped)::bigint AS skipped, sum(failed)::bigint AS failed
    FROM import_batches WHERE import_batches.workspace_id = imports.workspace_id AND import_id = imports.id
) AS later ON true;
