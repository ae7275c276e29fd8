-- The import log is one row an import: written with its first batch, completed at its end. finished_at stays empty while an import runs and
-- when it broke off; its counts are then those that were known last. Servers from before this migration write import_batches: stop them first.
--
-- What the batches of older imports left behind is added up. A batch whose import has no row was stored beside a first batch that was not;
-- nobody knows its key any more.
INSERT INTO imports (workspace_id, id, key_id, imported, skipped, failed)
SELECT workspace_id, import_id, 0, sum(imported), sum(skipped), sum(failed) FROM import_batches GROUP BY workspace_id, import_id
ON CONFLICT (workspace_id, id) DO UPDATE SET
    imported = imports.imported + excluded.imported,
    skipped = imports.skipped + excluded.skipped,
    failed = imports.failed + excluded.failed;
DROP VIEW import_log;
DROP TABLE import_batches;

-- What tells a repeat of an import from another import with the same request id; empty for imports from before this column.
ALTER TABLE import_requests ADD COLUMN fingerprint bytea;

-- The addresses that long dry runs have seen, so that repeats far apart are counted as they would be. No connection is held between the batches
-- of a dry run, so however slowly one is sent, it stands in nobody's way. Unlogged: a crash ends the dry runs, too.
CREATE UNLOGGED TABLE rehearsed (
    workspace_id bigint NOT NULL,
    -- A UUID of version 7, so the oldest come first.
    rehearsal uuid NOT NULL,
    address text COLLATE "C" NOT NULL,
    PRIMARY KEY (workspace_id, rehearsal, address)
);
