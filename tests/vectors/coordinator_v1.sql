BEGIN TRANSACTION;
CREATE TABLE agreements (
	digest BLOB NOT NULL, 
	series BLOB NOT NULL, 
	version INTEGER NOT NULL, 
	replaces BLOB, 
	canonical BLOB NOT NULL, 
	put_by BLOB NOT NULL, 
	put_ms INTEGER NOT NULL, 
	complete_ms INTEGER, 
	expires_ms INTEGER NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "agreements" VALUES(X'61',X'61',1,NULL,X'63',X'6B',1,2,1900000000000);
CREATE TABLE bundles (
	number INTEGER NOT NULL, 
	size INTEGER NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (number), 
	FOREIGN KEY(number) REFERENCES sessions (number)
);
CREATE TABLE countersignatures (
	roster BLOB NOT NULL, 
	party TEXT NOT NULL, 
	cose BLOB NOT NULL, 
	former BLOB NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (roster, party), 
	FOREIGN KEY(roster) REFERENCES rosters (digest)
);
INSERT INTO "countersignatures" VALUES(X'52','ann',X'63',X'',7);
CREATE TABLE events (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	agreement BLOB NOT NULL, 
	session BLOB, 
	kind TEXT NOT NULL, 
	member TEXT NOT NULL, 
	table_name TEXT NOT NULL, 
	code TEXT NOT NULL, 
	percent INTEGER NOT NULL, 
	at_ms INTEGER NOT NULL, 
	FOREIGN KEY(agreement) REFERENCES agreements (digest)
);
INSERT INTO "events" VALUES(1,X'61',X'73','opened','','','',0,4);
CREATE TABLE fetches (
	number INTEGER NOT NULL, 
	member TEXT NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (number, member), 
	FOREIGN KEY(number) REFERENCES sessions (number)
);
CREATE TABLE joins (
	number INTEGER NOT NULL, 
	digest BLOB NOT NULL, 
	party TEXT NOT NULL, 
	cose BLOB NOT NULL, 
	receipt BLOB, 
	code TEXT NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (number, digest), 
	FOREIGN KEY(number) REFERENCES sessions (number)
);
INSERT INTO "joins" VALUES(3,X'6A','ann',X'63',X'72','',5);
CREATE TABLE memberships (
	agreement BLOB NOT NULL, 
	name TEXT NOT NULL, 
	"key" BLOB NOT NULL, 
	PRIMARY KEY (agreement, name), 
	FOREIGN KEY(agreement) REFERENCES agreements (digest)
);
INSERT INTO "memberships" VALUES(X'61','ann',X'6B');
CREATE TABLE open_requests (
	"key" BLOB NOT NULL, 
	request BLOB NOT NULL, 
	number INTEGER NOT NULL, 
	PRIMARY KEY ("key", request), 
	FOREIGN KEY(number) REFERENCES sessions (number)
);
INSERT INTO "open_requests" VALUES(X'6B',X'72',3);
CREATE TABLE operators (
	"key" BLOB NOT NULL, 
	label TEXT NOT NULL, 
	added_ms INTEGER NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "operators" VALUES(X'6B','ann',1800000000000);
CREATE TABLE records (
	head BLOB NOT NULL, 
	series BLOB NOT NULL, 
	sequence INTEGER NOT NULL, 
	previous BLOB NOT NULL, 
	agreement BLOB NOT NULL, 
	number INTEGER NOT NULL, 
	cose BLOB NOT NULL, 
	document BLOB NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (head), 
	UNIQUE (series, sequence), 
	FOREIGN KEY(agreement) REFERENCES agreements (digest), 
	UNIQUE (number), 
	FOREIGN KEY(number) REFERENCES sessions (number)
);
CREATE TABLE refusals (
	roster BLOB NOT NULL, 
	party TEXT NOT NULL, 
	cose BLOB NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (roster, party), 
	FOREIGN KEY(roster) REFERENCES rosters (digest)
);
CREATE TABLE rosters (
	digest BLOB NOT NULL, 
	number INTEGER NOT NULL, 
	cose BLOB NOT NULL, 
	expires_ms INTEGER NOT NULL, 
	issued_ms INTEGER NOT NULL, 
	ended TEXT NOT NULL, 
	PRIMARY KEY (digest), 
	FOREIGN KEY(number) REFERENCES sessions (number)
);
INSERT INTO "rosters" VALUES(X'52',3,X'63',9,6,'');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(1);
CREATE TABLE sessions (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	session BLOB, 
	agreement BLOB NOT NULL, 
	series BLOB NOT NULL, 
	"begin" BLOB NOT NULL, 
	phase TEXT NOT NULL, 
	code TEXT NOT NULL, 
	enclave TEXT NOT NULL, 
	offer BLOB, 
	document BLOB, 
	start BLOB, 
	roster BLOB, 
	opened_ms INTEGER NOT NULL, 
	deadline_ms INTEGER NOT NULL, 
	ended_ms INTEGER, 
	stored_told BOOLEAN NOT NULL, 
	UNIQUE (session), 
	FOREIGN KEY(agreement) REFERENCES agreements (digest)
);
INSERT INTO "sessions" VALUES(3,X'73',X'61',X'61',X'62','open','','e',X'6F',X'64',NULL,NULL,4,0,NULL,0);
CREATE TABLE signatures (
	agreement BLOB NOT NULL, 
	member TEXT NOT NULL, 
	cose BLOB NOT NULL, 
	at_ms INTEGER NOT NULL, 
	PRIMARY KEY (agreement, member), 
	FOREIGN KEY(agreement) REFERENCES agreements (digest)
);
INSERT INTO "signatures" VALUES(X'61','ann',X'73',1);
CREATE TABLE uploads (
	number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	digest BLOB NOT NULL, 
	agreement BLOB NOT NULL, 
	party TEXT NOT NULL, 
	table_name TEXT NOT NULL, 
	cose BLOB NOT NULL, 
	owner BLOB NOT NULL, 
	size INTEGER NOT NULL, 
	stored INTEGER NOT NULL, 
	begun_ms INTEGER NOT NULL, 
	complete_ms INTEGER, 
	UNIQUE (digest), 
	FOREIGN KEY(agreement) REFERENCES agreements (digest)
);
INSERT INTO "uploads" VALUES(7,X'75',X'61','ann','t',X'63',X'6B',21474836480,12884901888,3,NULL);
CREATE INDEX ix_agreements_series ON agreements (series);
CREATE INDEX ix_memberships_key ON memberships ("key");
CREATE INDEX uploads_of_party ON uploads (agreement, party, table_name);
CREATE INDEX ix_uploads_owner ON uploads (owner);
CREATE INDEX ix_sessions_series ON sessions (series);
CREATE UNIQUE INDEX one_live_session ON sessions (series) WHERE phase IN ('launching', 'open', 'rostered', 'computing');
CREATE INDEX ix_events_session ON events (session);
CREATE INDEX events_of_agreement ON events (agreement, number);
CREATE INDEX ix_rosters_number ON rosters (number);
INSERT INTO "sqlite_sequence" VALUES('sessions',3);
INSERT INTO "sqlite_sequence" VALUES('uploads',7);
INSERT INTO "sqlite_sequence" VALUES('events',1);
COMMIT;
