# PostgreSQL, for what several coordinators share. A transaction that was acknowledged is in two zones; the network of the database
# leads nowhere; only the parents reach it. RDS keeps the administrator's password itself. The coordinators' own role owns their
# database and nothing else; deploy/README.md says how it is made.

locals {
  database_count = var.database == null ? 0 : 1
  state = var.database == null ? {
    database = "coordinator.db"
    blobs    = "blobs"
    } : {
    database = "postgresql://parley@${aws_db_instance.this[0].address}/parley?sslmode=verify-full&sslrootcert=/var/lib/parley/database-ca.pem"
    blobs    = "s3://${aws_s3_bucket.this.id}/blobs"
  }
}

resource "aws_subnet" "database" {
  for_each = var.database == null ? {} : { for index, zone in var.zones : zone => index }

  vpc_id            = aws_vpc.this.id
  availability_zone = each.key
  cidr_block        = cidrsubnet(var.vpc_cidr, 4, 8 + each.value)

  tags = { Name = "${var.name}-database-${each.key}" }
}

resource "aws_db_subnet_group" "this" {
  count = local.database_count

  name       = var.name
  subnet_ids = [for subnet in aws_subnet.database : subnet.id]

  lifecycle {
    precondition {
      condition     = length(var.zones) >= 2
      error_message = "zones: a database is in two of them."
    }
  }
}

resource "aws_security_group" "database" {
  count = local.database_count

  name        = "${var.name}-database"
  description = "Database of Parley: for the parents"
  vpc_id      = aws_vpc.this.id

  tags = { Name = "${var.name}-database" }
}

resource "aws_vpc_security_group_ingress_rule" "database" {
  count = local.database_count

  security_group_id            = aws_security_group.database[0].id
  description                  = "PostgreSQL from the parents"
  referenced_security_group_id = aws_security_group.parent.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_vpc_security_group_egress_rule" "database" {
  count = local.database_count

  security_group_id            = aws_security_group.parent.id
  description                  = "PostgreSQL"
  referenced_security_group_id = aws_security_group.database[0].id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_db_parameter_group" "this" {
  count = local.database_count

  name   = "${var.name}-postgres16"
  family = "postgres16"

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
}

resource "aws_db_instance" "this" {
  count = local.database_count

  identifier                  = var.name
  engine                      = "postgres"
  engine_version              = "16"
  instance_class              = var.database.instance_class
  parameter_group_name        = aws_db_parameter_group.this[0].name
  username                    = "postgres"
  manage_master_user_password = true

  storage_type      = "gp3"
  allocated_storage = var.database.storage_gib
  storage_encrypted = true

  multi_az               = true
  publicly_accessible    = false
  db_subnet_group_name   = aws_db_subnet_group.this[0].name
  vpc_security_group_ids = [aws_security_group.database[0].id]

  backup_retention_period   = min(var.backup_days, 35)
  copy_tags_to_snapshot     = true
  deletion_protection       = true
  skip_final_snapshot       = false
  final_snapshot_identifier = "${var.name}-last"

  lifecycle {
    prevent_destroy = true
  }
}
