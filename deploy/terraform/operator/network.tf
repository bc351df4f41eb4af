# Public subnets: the members come from outside. Nothing but the coordinators' port answers, and only to their networks and to one
# another; administrators use Session Manager, which needs no port at all.

resource "aws_vpc" "this" {
  cidr_block           = var.vpc_cidr
  enable_dns_support   = true
  enable_dns_hostnames = true

  tags = { Name = var.name }
}

# The default group of a network lets its members talk to each other; here it lets nobody do anything.
resource "aws_default_security_group" "closed" {
  vpc_id = aws_vpc.this.id
}

resource "aws_subnet" "public" {
  for_each = { for index, zone in var.zones : zone => index }

  vpc_id                  = aws_vpc.this.id
  availability_zone       = each.key
  cidr_block              = cidrsubnet(var.vpc_cidr, 4, each.value)
  map_public_ip_on_launch = false

  tags = { Name = "${var.name}-public-${each.key}" }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id

  tags = { Name = var.name }
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.this.id

  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.this.id
  }

  tags = { Name = "${var.name}-public" }
}

resource "aws_route_table_association" "public" {
  for_each = aws_subnet.public

  subnet_id      = each.value.id
  route_table_id = aws_route_table.public.id
}

# Images, tables, bundles and backups stay within AWS's network.
resource "aws_vpc_endpoint" "s3" {
  vpc_id            = aws_vpc.this.id
  service_name      = "com.amazonaws.${var.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = [aws_route_table.public.id]
}

resource "aws_security_group" "parent" {
  name        = "${var.name}-parent"
  description = "Coordinators of Parley: their port, for the members and one another"
  vpc_id      = aws_vpc.this.id

  tags = { Name = "${var.name}-parent" }
}

resource "aws_vpc_security_group_ingress_rule" "members" {
  for_each = toset(var.members_cidrs)

  security_group_id = aws_security_group.parent.id
  description       = "gRPC over TLS"
  cidr_ipv4         = each.value
  ip_protocol       = "tcp"
  from_port         = 7443
  to_port           = 7443
}

# A call that another coordinator must answer is passed on to it.
resource "aws_vpc_security_group_ingress_rule" "peers" {
  security_group_id            = aws_security_group.parent.id
  description                  = "gRPC over TLS from other coordinators"
  referenced_security_group_id = aws_security_group.parent.id
  ip_protocol                  = "tcp"
  from_port                    = 7443
  to_port                      = 7443
}

resource "aws_vpc_security_group_egress_rule" "peers" {
  security_group_id            = aws_security_group.parent.id
  description                  = "gRPC over TLS to other coordinators"
  referenced_security_group_id = aws_security_group.parent.id
  ip_protocol                  = "tcp"
  from_port                    = 7443
  to_port                      = 7443
}

# Packages of Amazon Linux, Session Manager, S3 and the parties' KMS: all of it HTTPS.
resource "aws_vpc_security_group_egress_rule" "https" {
  security_group_id = aws_security_group.parent.id
  description       = "HTTPS"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_eip" "parent" {
  for_each = var.parents

  domain   = "vpc"
  instance = aws_instance.parent[each.key].id

  tags       = { Name = "${var.name}-${each.key}" }
  depends_on = [aws_internet_gateway.this]
}
