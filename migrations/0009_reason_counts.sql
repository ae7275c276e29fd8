-- How many entries a workspace has of each type with each reason, so that neither a summary nor the total of a filter by type and reason
-- counts them. Written as entry_counts is: in the transaction of each batch, as the sum over several parts. The totals stay in entry_counts,
-- since a list may have as many reasons as entries. Servers from before this migration do not write it: stop them first.
CREATE TABLE reason_counts (
    workspace_id bigint NOT NULL,
    reason text COLLATE "C" NOT NULL,
    is_domain boolean NOT NULL,
    part smallint NOT NULL,
    entries bigint NOT NULL,
    PRIMARY KEY (workspace_id, reason, is_domain, part)
);
-- Nothing may come in between the counting and the first batch that is counted.
LOCK TABLE entries IN SHARE MODE;
INSERT INTO reason_counts (workspace_id, reason, is_domain, part, entries)
SELECT workspace_id, reason, strpos(address, '@') = 0, 0, count(*) FROM entries GROUP BY 1, 2, 3;
