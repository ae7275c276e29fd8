-- The import log: who put what here, and when. A row is written in the transaction of each batch, so its counts are exactly
-- what is stored, whatever crashes. finished_at stays empty for an import that broke.
CREATE TABLE imports (
    workspace_id bigint NOT NULL,
    id uuid NOT NULL,
    key_id bigint NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    imported bigint NOT NULL,
    skipped bigint NOT NULL,
    failed bigint NOT NULL,
    PRIMARY KEY (workspace_id, id)
);
